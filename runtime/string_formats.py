"""The values of a JSON schema's `format` that are enforced: by a pattern here, or by xgrammar."""

_DATE = (
    r"[1-9]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)"
    r"|02-(0[1-9]|1\d|2[0-8]))"
)
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_OCTET = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
PATTERNS = {  # stricter than xgrammar's own: no 31 February, no 01.1.1.1
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "ipv4": rf"^({_OCTET}\.){{3}}{_OCTET}$",
}
BUILT_IN = {
    *("email", "duration", "ipv6", "hostname", "uuid", "uri", "uri-reference", "uri-template"),
    *("json-pointer", "relative-json-pointer"),
}
