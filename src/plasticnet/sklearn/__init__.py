"""Estimators of scikit-learn that choose their own widths."""

from plasticnet.sklearn.mlp import PlasticMLPClassifier, PlasticMLPRegressor

__all__ = ["PlasticMLPClassifier", "PlasticMLPRegressor"]
