"""How answers are made and scored."""
