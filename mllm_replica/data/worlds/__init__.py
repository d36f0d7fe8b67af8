"""Procedural pictures with exact questions and answers."""
