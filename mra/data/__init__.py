"""The data pipeline: from images and records to batches.

Read files.py, records.py, augment.py, words.py, tokenizer.py and batches.py.
"""
