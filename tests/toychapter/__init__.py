"A chapter small enough to run many times: stands in for a paper in the tests of runner and tracker."
