"""What sets the threshold: the protocol, laws, schedules, and when a quantile is selected."""
