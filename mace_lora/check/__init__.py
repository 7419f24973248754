"""Whether labelled frames are what they are taken for: units, signs, and what is odd in a set."""
