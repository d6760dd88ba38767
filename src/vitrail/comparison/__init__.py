"""Which model is better on these images, by measurement: trainings under equal budgets, paired tests, a report."""
