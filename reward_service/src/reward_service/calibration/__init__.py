"""`reward-service calibrate`: what the scores of labelled rollouts say, and how well."""
