"""What every room may use: checks of values, versions, and the one door to torch's private parts."""
