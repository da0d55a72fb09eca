"""Define what all files that a user writes have in common: their sections, and the names in them.

Every field with a dimension states its unit.
"""

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

# of a material or a model: a part of paths, which must not lead out of their folders
NAME = "[A-Za-z0-9_]+"
Name = Annotated[str, Field(pattern=f"^{NAME}$")]


class Section(BaseModel):
    """Part of a file.

    unsaid: fields that are left out of dumps where they have their default, so that hashes and parameters of rules of a file
    that does not use them are those of versions that lacked them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    unsaid: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        fields = type(self).model_fields
        default = {name: fields[name].get_default(call_default_factory=True) for name in self.unsaid}
        return {name: value for name, value in handler(self).items() if name not in default or value != default[name]}
