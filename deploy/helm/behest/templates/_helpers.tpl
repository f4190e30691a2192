{{- define "behest.name" -}}
{{- default .Release.Name .Values.fullnameOverride | replace "." "-" | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Of what belongs to no namespace: unlike that of a release of the same name elsewhere, at most 53 characters. */}}
{{- define "behest.clusterName" -}}
{{- $name := printf "%s-%s" (include "behest.name" .) .Release.Namespace -}}
{{- if gt (len $name) 53 -}}
{{- printf "%s-%s" ($name | trunc 44 | trimSuffix "-") ($name | sha256sum | trunc 8) -}}
{{- else -}}
{{- $name -}}
{{- end -}}
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
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "behest.selector" -}}
app.kubernetes.io/name: behest
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* The Secret and key with the DSN of the ledger's owner. */}}
{{- define "behest.database" -}}
{{- if .Values.database.external.secretName -}}
{name: {{ .Values.database.external.secretName | quote }}, key: {{ .Values.database.external.secretKey | quote }}}
{{- else -}}
{name: {{ include "behest.name" . }}-postgres, key: database-url}
{{- end -}}
{{- end -}}

{{- define "behest.masterKey" -}}
{name: {{ .Values.masterKey.secretName | default (printf "%s-master-key" (include "behest.name" .)) | quote }}, key: {{ .Values.masterKey.secretKey | quote }}}
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

{{/* Each writer of the webhook's certificate has its own Secret: theirs are of different types, which cannot be changed. */}}
{{- define "behest.webhookSecret" -}}
{{ include "behest.name" . }}-webhook-{{ eq .Values.webhook.certificates.from "operator" | ternary "tls" "certificate" }}
{{- end -}}

{{/* OpenTelemetry's variables of a container of ours. */}}
{{- define "behest.telemetry" -}}
{{- range $variable, $value := .Values.telemetry.environment }}
- {name: {{ $variable }}, value: {{ $value | quote }}}
{{- end }}
{{- with .Values.telemetry.headers }}
{{- if .secretName }}
- name: OTEL_EXPORTER_OTLP_HEADERS
  valueFrom: {secretKeyRef: {name: {{ .secretName | quote }}, key: {{ .secretKey | quote }}, optional: true}}
{{- end }}
{{- end }}
{{- end -}}

{{/* From where metrics may be asked for. */}}
{{- define "behest.prometheus" -}}
{{- with .Values.networkPolicies.prometheusNamespaces -}}
from:
  - namespaceSelector:
      matchExpressions:
        - {key: kubernetes.io/metadata.name, operator: In, values: {{ toJson . }}}
{{- else -}}
from: [{namespaceSelector: {}}]
{{- end -}}
{{- end -}}

{{- define "behest.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end -}}
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

{{/* What a schema cannot say: each message says what to do. */}}
{{- define "behest.check" -}}
{{- if not (regexMatch "^[a-z]" (include "behest.name" .)) -}}
{{- fail "names of Services begin with a letter: set fullnameOverride, or name the release otherwise" -}}
{{- end -}}
{{- $external := .Values.database.external -}}
{{- if and .Values.database.trial.enabled $external.secretName -}}
{{- fail "database: set trial.enabled to false, or leave external.secretName empty: there is one ledger" -}}
{{- end -}}
{{- if not (or .Values.database.trial.enabled $external.secretName) -}}
{{- fail "database: name the Secret with the ledger's DSN in database.external.secretName, or set database.trial.enabled" -}}
{{- end -}}
{{- if and (ne $external.sidecarPooler "none") (not $external.sidecarURL) -}}
{{- fail "database.external.sidecarPooler: is what stands at sidecarURL: set database.external.sidecarURL too" -}}
{{- end -}}
{{- if and $external.sidecarURL (not $external.secretName) -}}
{{- fail "database.external.sidecarURL: is for a database of your own: set database.external.secretName too, or leave it empty" -}}
{{- end -}}
{{- if has "kube-system" .Values.namespaces -}}
{{- fail "namespaces: kube-system is never looked after: take it out of the list" -}}
{{- end -}}
{{- if .Values.webhook.enabled -}}
{{- with .Values.sidecar -}}
{{- if lt (list (int .port) (int .podPort) (int .adminPort) | uniq | len) 3 -}}
{{- fail "sidecar: port, podPort and adminPort must differ from each other" -}}
{{- end -}}
{{- end -}}
{{- else if eq .Values.webhook.certificates.from "cert-manager" -}}
{{- fail "webhook.certificates.from: there is no webhook to certify: set webhook.enabled, or leave it at operator" -}}
{{- else if .Values.sidecar.defaultProject -}}
{{- fail "sidecar.defaultProject: nobody adds sidecars: set webhook.enabled, or leave it empty" -}}
{{- end -}}
{{- if and .Values.telemetry.headers.secretName (hasKey .Values.telemetry.environment "OTEL_EXPORTER_OTLP_HEADERS") -}}
{{- fail "telemetry: the headers stand in headers.secretName or in environment.OTEL_EXPORTER_OTLP_HEADERS, not in both" -}}
{{- end -}}
{{- with .Values.gateway -}}
{{- if .enabled -}}
{{- if and .autoscaling.enabled (gt (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas)) -}}
{{- fail "gateway.autoscaling: minReplicas must not be above maxReplicas" -}}
{{- end -}}
{{- if and .providerKeysSecretName (not .providerKeysFor) -}}
{{- fail "gateway.providerKeysFor: say who may use which key of providerKeysSecretName, such as OPENAI_API_KEY=https://api.openai.com" -}}
{{- else if and .providerKeysFor (not .providerKeysSecretName) -}}
{{- fail "gateway.providerKeysFor: name the Secret with these keys in providerKeysSecretName, or leave it empty" -}}
{{- end -}}
{{- else if or .autoscaling.enabled .providerKeysSecretName .providerKeysFor -}}
{{- fail "gateway: autoscaling.enabled, providerKeysSecretName and providerKeysFor are for a gateway: set gateway.enabled, or leave them empty" -}}
{{- end -}}
{{- end -}}
{{- end -}}
