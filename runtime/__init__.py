"""The ground floor: an engine directory becomes tokens. Knows neither text nor HTTP."""
