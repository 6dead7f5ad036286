"""What users are told of the replication of their variables: `%nbos state`, progress, warnings of what costs much."""
