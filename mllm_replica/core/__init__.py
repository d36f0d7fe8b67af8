"""What everything else stands on: settings, recipes, the registry of papers, metrics, keys."""
