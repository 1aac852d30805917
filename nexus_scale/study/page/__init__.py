"""What the page of a study is made of."""
