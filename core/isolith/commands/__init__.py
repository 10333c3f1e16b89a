"""The commands, one file each: what they answer, as data, and how that reads."""

from types import MappingProxyType

from isolith.commands.bisect import COMMAND as BISECT
from isolith.commands.certificates import COMMAND as CERTIFICATES
from isolith.commands.command import Command
from isolith.commands.config import COMMAND as CONFIG
from isolith.commands.cost import COMMAND as COST
from isolith.commands.new_backend import COMMAND as NEW_BACKEND
from isolith.commands.new_op import COMMAND as NEW_OP
from isolith.commands.ops import COMMAND as OPS
from isolith.commands.status import COMMAND as STATUS
from isolith.commands.table import COMMAND as TABLE
from isolith.commands.why import COMMAND as WHY

COMMANDS = MappingProxyType(
    {
        command.name: command
        for command in (STATUS, OPS, WHY, BISECT, TABLE, CERTIFICATES, COST, CONFIG, NEW_BACKEND, NEW_OP)
    }
)

__all__ = ["COMMANDS", "Command"]
