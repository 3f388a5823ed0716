"""What stands in for the loss of a finished plan: cheaper judges of candidates, and predictors of their losses."""
