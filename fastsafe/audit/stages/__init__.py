"""Train, generate and judge: each reads its work list from the store and appends rows."""
