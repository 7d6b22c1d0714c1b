// Before the first paint: the colours that this browser was told to use.
const theme = localStorage.getItem("enginehouse.theme");
if (theme) document.documentElement.dataset.theme = theme;
