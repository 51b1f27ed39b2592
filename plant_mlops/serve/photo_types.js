() => {
  // Most browsers know no type for a HEIC, and Gradio takes files of the type image only. The server decides by content.
  const typed = file => file.type ? file : new File([file], file.name, {type: 'image/unknown'})
  const isPhotoInput = input => input.matches?.('.pm-photo input[type=file]')
  function setFiles(input, files) {
    const transfer = new DataTransfer()
    for (const file of files) transfer.items.add(typed(file))
    input.files = transfer.files
  }
  document.addEventListener('click', event => {
    if (isPhotoInput(event.target)) event.target.accept = 'image/*,SUFFIXES'
  }, true)
  document.addEventListener('change', event => {
    if (isPhotoInput(event.target) && [...event.target.files].some(file => !file.type)) setFiles(event.target, event.target.files)
  }, true)
  document.addEventListener('drop', event => {
    const files = [...event.dataTransfer?.files ?? []]
    const input = event.target.closest?.('.pm-photo')?.querySelector('input[type=file]')
    if (!input || !files.some(file => !file.type)) return
    event.preventDefault()
    event.stopPropagation()
    setFiles(input, files.slice(0, 1))
    input.dispatchEvent(new Event('change', {bubbles: true}))
  }, true)
}
