"""Find wrong labels. See docs/methods/sbdc.md, section 1.

Three detectors, each a function `detect`:

* `cores` trains a classifier on the images that a sample sieve keeps;
* `confident` trains classifiers on parts of the images and lets the package cleanlab judge the rest;
* `classifier` asks a classifier that `train_classifier.py` has trained.

`options` chooses among them. `trainer` holds the training that the first two share. `quality` turns a posterior into a
label file and describes it in words, numbers and a picture. `inspection` looks beyond labels, by `outliers` and
`duplicates`.
"""
