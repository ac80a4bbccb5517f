"""The embedded model of emoji, and the judge that looks at what it draws; see docs/emoji.md."""
