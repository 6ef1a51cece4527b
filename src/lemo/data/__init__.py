"""Documents to training sequences: reading, labelling, cutting, packing, collating, accounting.

loaded = lemo.data.load(cfg.data, tokenizer, seed)  # .train and .heldout: datasets.Dataset; .report
collate = lemo.data.Collator.for_tokenizer(tokenizer)
"""

from lemo.data.account import DataReport, SplitAccount, Tally
from lemo.data.collate import Collator
from lemo.data.loading import Loaded, load, load_heldout

__all__ = ["Collator", "DataReport", "Loaded", "SplitAccount", "Tally", "load", "load_heldout"]
