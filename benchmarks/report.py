def write_report(*a): pass
FLOWER="flower"
