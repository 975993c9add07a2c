"""Dataset rows: the formats that the package reads, their token ids, and the batches that a model gets.

Training, poisoning and evaluation all render a row in the same way. The formats are listed below. If the columns of a
dataset fit several formats, the first one in the table counts.

| columns | how a row is rendered |
|---|---|
| `input_ids`, optionally `labels` and `attention_mask` | used unchanged |
| `messages` or `conversations` | with the tokenizer's chat template; the last message must be the assistant's |
| `prompt` and `completion` or `chosen`; `question`, `answer` | used unchanged |
| `instruction`, `output`, optionally `input` | as a chat if the tokenizer has a chat template, else in Alpaca's form |
| `instruction`, `response`, optionally `context` | like the last one |
| `text` | used unchanged; the loss covers the whole text |

`prompt` and `completion` or `chosen` may also be lists of messages, as in TRL. Together they are a chat.

A message has a `role` and a `content`, or `from` and `value` as in ShareGPT. An answer of white space is none: its row
is dropped, with a warning that counts such rows. `crow_hf.data.rows.ALPACA_PROMPT` holds Alpaca's form.
"""
