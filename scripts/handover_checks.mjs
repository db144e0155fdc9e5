// An exported model in transformers.js, for check_transformers_js of handover_checks.py.
//
//     node check.mjs FOLDER ANSWERS.json FAMILY
//
// FOLDER has onnx/model.onnx, and the JSON files of an export. Prints a few words.

import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";

import { env, pipeline } from "@huggingface/transformers";

const [folder, answers, family] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder) + "/";
const { rows, end } = JSON.parse(readFileSync(answers))[family];
const generate = await pipeline("text-generation", basename(folder), { dtype: "fp32" });

// Pipelines return text and no ids, and stop at the first end-of-text.
let n = 0;
for (const { prompt, tokens } of rows) {
  const ids = tokens.includes(end) ? tokens.slice(0, tokens.indexOf(end)) : tokens;
  const options = { max_new_tokens: tokens.length, do_sample: false, return_full_text: false };
  const [{ generated_text }] = await generate(prompt, options);
  n += generated_text === generate.tokenizer.decode(ids, { skip_special_tokens: true });
}
console.log(n === rows.length ? "equal" : `${n} of ${rows.length} continuations are equal`);
