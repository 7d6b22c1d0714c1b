"""The values of a JSON schema's `format` that are enforced: by a pattern here, or by xgrammar."""

_DATE = (
    r"[1-9]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)"
    r"|02-(0[1-9]|1\d|2[0-8]))"
)
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_OCTET = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_GROUP = "[0-9A-Fa-f]{1,4}"
_IPV6 = "|".join(
    [f"({_GROUP}:){{7}}{_GROUP}", f"({_GROUP}:){{1,7}}:", f":(:{_GROUP}){{1,7}}", "::"]
    + [f"({_GROUP}:){{1,{7 - n}}}(:{_GROUP}){{1,{n}}}" for n in range(1, 7)]
)
_POINTER = "(/([ -.0-}]|~[01])*)*"
PATTERNS = {  # stricter than xgrammar's own: no 31 February, no 01.1.1.1, no control characters
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "ipv4": rf"^({_OCTET}\.){{3}}{_OCTET}$",
    "ipv6": f"^({_IPV6})$",
    "json-pointer": f"^{_POINTER}$",
    "relative-json-pointer": f"^(0|[1-9][0-9]*)(#|{_POINTER})$",
}
BUILT_IN = {"email", "duration", "hostname", "uuid", "uri", "uri-reference", "uri-template"}
_LABEL = "[0-9A-Za-z]([-0-9A-Za-z]{0,61}[0-9A-Za-z])?"
_LONG_LABEL = "[0-9A-Za-z]([-0-9A-Za-z]*[0-9A-Za-z])?"
_ATOM = "[0-9A-Za-z!#$%&'*+/=?^_`{|}~-]+"
_IN_URI = "[0-9A-Za-z._~/?!$&'()*+,;=-]"
# Of the formats that xgrammar has by itself: patterns to combine with others, each of some of what
# the format takes.
COMBINED = {
    "email": rf"^{_ATOM}(\.{_ATOM})*@{_LONG_LABEL}(\.{_LONG_LABEL})+$",
    "hostname": rf"^{_LABEL}(\.{_LABEL})*$",
    "uuid": "^[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}$",
    "uri": f"^[A-Za-z][0-9A-Za-z+.-]*:{_IN_URI}+(#{_IN_URI}*)?$",
    "uri-reference": f"^{_IN_URI}*(#{_IN_URI}*)?$",
    "uri-template": rf"^({_IN_URI}|\{{[0-9A-Za-z_]+\}})*$",
    "duration": r"^P(\d+W|(\d+Y(\d+M(\d+D)?)?|\d+M(\d+D)?|\d+D)(T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?"
    r"|\d+S))?|T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S))$",
}
