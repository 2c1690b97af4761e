"""The Celo2 update: reference, sharded passes, layouts, rules."""
