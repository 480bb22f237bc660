"""The transport on Kafka, by aiokafka."""

from bus.kafka.reader import UnreadablePartition
from bus.kafka.transport import KafkaTransport

__all__ = ["KafkaTransport", "UnreadablePartition"]
