"""One `with` block: when a pass begins and ends, who answers a module's call, what is missed."""

from fmapkit.session.analyses import Analyses as Analyses
from fmapkit.session.analyses import Analysis as Analysis
from fmapkit.session.config import CaptureConfig as CaptureConfig
from fmapkit.session.resting import EndedBlock as EndedBlock
from fmapkit.session.resting import RestingSession as RestingSession
from fmapkit.session.resting import request_of as request_of
from fmapkit.session.resting import resting_session as resting_session
from fmapkit.session.session import Rest as Rest
from fmapkit.session.session import Session as Session
