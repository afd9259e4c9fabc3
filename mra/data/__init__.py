"""The data pipeline. Read files.py, records.py, augment.py, words.py, tokenizer.py, batches.py."""
