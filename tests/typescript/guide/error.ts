try {
  for await (const chunk of stream) render(chunk);
} catch (err) {
  const status = (err as { status?: number }).status;
  if (status === 402) showUpgradeModal(err);
  else if (status === 429) backoffToast(err);
  else renderError("Something went wrong — tap to retry.");
}
