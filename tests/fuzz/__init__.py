"""A fuzzer of what strangers hand us: mutated checkpoints through merge.py, each merged right or refused in one message; and mutants of
every file that the toolkit writes and reads again, each used as before or refused in one message.

    make fuzz                                             # 4,000 mutants of each kind of checkpoint, 20,000 of our own files
    make fuzz FUZZ_ARGS="--mutants 500 --kinds headers,indexes --seed 7 --json faults.json"

models.py             tiny sound checkpoints, one family for each way of storing them
mutants.py            strategies of hypothesis: which changes are made to which models
change_json.py        changes to JSON
change_weights.py     to safetensors files and their index
change_pickles.py     to pytorch_model.bin
change_side_files.py  to configs and tokenizers
reading.py            what the merge should be, from the bytes, read by other libraries than ours
trial.py              one merge of a mutant, and the verdict on it
own_files.py          results, recipes, activations, work folders, caches: mutants, and the verdict on them
__main__.py           many mutants in processes of their own, and a table
"""
