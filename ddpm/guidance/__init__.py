"""Guidance: predictions combined or shifted towards a condition, Denoise in, Denoise out, before the clip."""

from ddpm.guidance.bound import Auto, ByClassifier, ClassifierFree, ClassifierOf, Guidance, Trained
from ddpm.guidance.classifier import classifier
from ddpm.guidance.classifier_free import autoguidance, classifier_free

__all__ = [
    "Auto",
    "ByClassifier",
    "ClassifierFree",
    "ClassifierOf",
    "Guidance",
    "Trained",
    "autoguidance",
    "classifier",
    "classifier_free",
]
