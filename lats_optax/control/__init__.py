"""What sets the threshold: protocol, laws, schedules, targets, when a quantile is selected."""
