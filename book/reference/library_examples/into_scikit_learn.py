"""Frozen features as arrays, into scikit-learn."""

import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import adjusted_rand_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import sslbook
from sslbook.evaluation.features import extract_features
from sslbook.nn import ConvNet

data = sslbook.Data(shapes=sslbook.Shapes(num_train=200, num_test=100))
torch.manual_seed(0)
backbone = ConvNet()  # or: sslbook.load_backbone("runs/simclr-shapes")[0]
view = sslbook.View.center(16)  # the center, at the size it was trained on

train_x, train_y = extract_features(backbone, data, "train", view, progress=False)
test_x, test_y = extract_features(backbone, data, "test", view, progress=False)

# The penalty is chosen by cross-validation on training images, never on test images.
probe = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=[0.01, 0.1, 1], cv=3))
probe.fit(train_x.numpy(), train_y.numpy())
print("accuracy", round(100 * probe.score(test_x.numpy(), test_y.numpy()), 1), "%")

clusters = KMeans(data.num_classes, n_init=3, random_state=0).fit(train_x.numpy())
index = adjusted_rand_score(train_y, clusters.labels_)
print("adjusted Rand index", round(index, 3))
