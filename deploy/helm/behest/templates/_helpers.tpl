{{- define "behest.name" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "behest.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "behest.labels" -}}
{{ include "behest.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "behest.selector" -}}
app.kubernetes.io/name: behest
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* The Secret and key with the DSN of the ledger's owner. */}}
{{- define "behest.database" -}}
{{- if .Values.database.external.secretName -}}
{name: {{ .Values.database.external.secretName }}, key: {{ .Values.database.external.secretKey }}}
{{- else -}}
{name: {{ include "behest.name" . }}-postgres, key: database-url}
{{- end -}}
{{- end -}}

{{- define "behest.masterKey" -}}
{name: {{ default (printf "%s-master-key" (include "behest.name" .)) .Values.masterKey.secretName }}, key: {{ .Values.masterKey.secretKey }}}
{{- end -}}

{{/* The `restricted` Pod Security Standard. */}}
{{- define "behest.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "behest.containerSecurity" -}}
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "behest.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "behest.check" -}}
{{- if and .Values.database.trial.enabled .Values.database.external.secretName -}}
{{- fail "database: set trial.enabled to false, or leave external.secretName empty: there is one ledger" -}}
{{- end -}}
{{- if not (or .Values.database.trial.enabled .Values.database.external.secretName) -}}
{{- fail "database: name the Secret with the ledger's DSN in database.external.secretName, or set database.trial.enabled" -}}
{{- end -}}
{{- end -}}
