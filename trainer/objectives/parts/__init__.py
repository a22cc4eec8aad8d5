"""Parts that objectives share: how times are drawn, errors measured and noise levels weighted.

An objective is assembled from them: `time_distributions` give the t of each sample,
`distances` turn differences into errors, `weightings` say how much each noise level counts,
and `lpips` adds a perceptual distance between images.
"""
