// Emmett on PostgreSQL, obeying the orders that serving.py explains. Run with its node_modules in NODE_PATH's place:
// install.py copies this file beside them.
import { createHash, randomUUID } from "node:crypto";
import { createInterface } from "node:readline";
import { dumbo } from "@event-driven-io/dumbo";
import { getPostgreSQLEventStore, readMessagesBatch } from "@event-driven-io/emmett-postgresql";

const TEXT = "x".repeat(140);
const PAGE = 1000;

const key = (number) => createHash("sha1").update(`stream ${number}`).digest("hex").slice(0, 32);
const stream = (id) => `note-${id}`;
const noted = (id) => ({ type: "Noted", data: { note_id: id, n: 0, text: TEXT } });
const initialState = () => ({ count: 0, total: 0 });
const evolve = (state, event) => ({ count: state.count + 1, total: state.total + event.data.n });

let store;
let pool;

async function appendMany(id, after, count) {
  const events = Array.from({ length: count }, () => noted(id));
  const expected = after === 0 ? "STREAM_DOES_NOT_EXIST" : BigInt(after);
  await store.appendToStream(stream(id), events, { expectedStreamVersion: expected });
}

async function load(id) {
  const { state } = await store.aggregateStream(stream(id), { evolve, initialState });
  return state.count + state.total;
}

async function readAll() {
  let found = 0;
  let after = 0n;
  for (;;) {
    const page = await readMessagesBatch(pool.execute, { after, batchSize: PAGE });
    for (const message of page.messages) found += 1 + message.data.n;
    if (page.messages.length === 0) return found;
    after = page.currentGlobalPosition;
  }
}

function expect(found, wanted) {
  if (found !== wanted) throw new Error(`found ${found} events, wanted ${wanted}`);
}

async function obey(order) {
  const began = performance.now();
  const end = began + 1000 * (order.seconds ?? 0);
  let done = 0;
  if (order.op === "append") {
    const caller = async () => {
      while (performance.now() < end) {
        await appendMany(randomUUID(), 0, 1);
        done += 1;
      }
    };
    await Promise.all(Array.from({ length: order.callers }, caller));
  } else if (order.op === "bulk") {
    while (performance.now() < end) {
      await appendMany(randomUUID(), 0, order.many);
      done += order.many;
    }
  } else if (order.op === "fill") {
    for (let number = 0; number < order.streams; number += 1) {
      for (let after = 0; after < order.each; after += PAGE) {
        const count = Math.min(PAGE, order.each - after);
        await appendMany(key(number), after, count);
        done += count;
      }
    }
  } else if (order.op === "load") {
    for (let number = 0; ; number += 1) {
      expect(await load(key(number % order.streams)), order.each);
      done += order.each;
      if (performance.now() >= end) break;
    }
  } else if (order.op === "log") {
    expect(await readAll(), order.events);
    done = order.events;
  } else throw new Error(`no such order: ${order.op}`);
  return (1000 * done) / (performance.now() - began);
}

const answer = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);

for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line);
  try {
    if (order.op === "open") {
      store = getPostgreSQLEventStore(order.dsn);
      await store.schema.migrate();
      pool = dumbo({ connectionString: order.dsn });
      answer({ value: 1 });
    } else answer({ value: await obey(order) });
  } catch (error) {
    console.error(error);
    answer({ error: `${error.name}: ${error.message}`.slice(0, 300) });
  }
}
process.exit(0); // its pools would keep the process alive
