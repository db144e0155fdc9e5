// An exported GGUF file in llama.cpp, for check_llama_cpp of handover_checks.py.
//
//     node check.mjs MODEL.gguf ANSWERS.json FAMILY N
//
// Prints the N most probable tokens after each prompt, which llama.cpp cuts into tokens itself.

import { readFileSync } from "node:fs";

import { getLlama } from "node-llama-cpp";

const [modelPath, answers, family, n] = process.argv.slice(2);
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
const model = await llama.loadModel({ modelPath });
const context = await model.createContext({ contextSize: 64 });
const found = [];
for (const { prompt } of JSON.parse(readFileSync(answers))[family].rows) {
  const sequence = context.getSequence();
  const ids = [model.tokens.bos, ...model.tokenize(prompt)];
  const tokens = [];
  for await (const token of sequence.evaluate(ids, { temperature: 0 })) {
    tokens.push(token);
    if (tokens.length === Number(n)) break;
  }
  found.push(tokens);
  sequence.dispose();
}
console.log(JSON.stringify(found));
