"""Faults for `benchmarks/faults.py`: what can go wrong with a run, how it is brought about, and what must hold after.

`scenarios` has the runs, `plan` draws the faults, `inside` and `points` bring them about in a run's own processes,
`damage` on its files, `group` starts and ends the processes as torchrun would, `chain` puts faults and resumes in a
row, `verdict` compares the end with that of the undisturbed run, `campaign` does many chains and keeps their journal.
"""
