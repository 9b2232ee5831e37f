"""Find wrong labels. See docs/methods/sbdc.md, section 1.

Detectors, each a function `detect`:

* `gce`, the default, trains a classifier with a loss that wrong labels hardly move;
* `cores` trains a classifier on the images that a sample sieve keeps;
* `confident` trains classifiers on parts of the images and lets the package cleanlab judge the rest;
* `classifier` asks a classifier that `train_classifier.py` has trained;
* `features` trains a linear classifier of the features of a network that others have trained.

`options` chooses among them. `trainer` holds the training that `gce`, `cores` and `confident` share. `quality` turns a
posterior into a label file and describes it in words, numbers and a picture. `inspection` looks beyond labels, by
`outliers` and `duplicates`.
"""
