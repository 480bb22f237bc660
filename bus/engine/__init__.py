"""The parts of the consumer engine (`bus/consumer.py`): queues per key, watermarks, partitions, lanes, retries."""
