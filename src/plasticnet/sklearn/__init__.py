"""Estimators of scikit-learn that choose their own widths."""

from plasticnet.sklearn.classifier import PlasticMLPClassifier
from plasticnet.sklearn.regressor import PlasticMLPRegressor

__all__ = ["PlasticMLPClassifier", "PlasticMLPRegressor"]
