from mar_mini import MAR, training
from mar_mini.checks import exercise
@exercise(reference=MAR.forward)
def training_loss(candidate): pass
@exercise(reference=training.ema_step)
def ema_step(candidate): pass
@exercise(reference=training.training_step)
def training_step(candidate): pass
