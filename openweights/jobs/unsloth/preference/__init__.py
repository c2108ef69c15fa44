"""DPO and ORPO: pairs of answers, one of which is preferred."""
