"""The course as a whole: its chapters, this machine, a doctor for trainings."""
