// Polls for changes through the hidden button of the page, and reloads when the kernel is gone.
const pollEvery = 5000       // milliseconds
const checkKernelEvery = 15000

function voilaConfig() {
  return JSON.parse(document.getElementById('jupyter-config-data').textContent)
}

// The hidden button is the last element of the page: when it is there, the page is complete.
const waiting = setInterval(() => {
  const button = document.querySelector('.pm-poll')
  if (!button) return
  clearInterval(waiting)
  button.click()
  setInterval(() => document.hidden || button.click(), pollEvery)
}, 100)

// The kernel is gone after a restart of the server, or when it was idle for too long.
setInterval(async () => {
  const { baseUrl, kernelId } = voilaConfig()
  const answer = await fetch(`${baseUrl}api/kernels/${kernelId}`).catch(() => null)
  if (answer?.status === 404) location.reload()
}, checkKernelEvery)
