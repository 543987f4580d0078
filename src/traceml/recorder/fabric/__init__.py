"""Place of a rank's host in the cluster's network."""
