() => document.querySelector('.pm-card h2, .pm-error')?.closest('.pm-card').scrollIntoView({behavior: 'smooth', block: 'nearest'})
