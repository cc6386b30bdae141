"""From a recipe to a trained model, whatever the task and the system."""
