{{/* There is one Hearth in a cluster: its objects are called hearth, whatever the release is. */}}
{{- define "hearth.labels" -}}
app.kubernetes.io/name: hearth
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "hearth.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "hearth.tlsSecret" -}}
{{- if and .Values.tls.certManager.enabled .Values.tls.selfSigned.enabled -}}
{{ fail "tls.selfSigned.enabled: want it without tls.certManager.enabled" }}
{{- else if or .Values.tls.certManager.enabled .Values.tls.selfSigned.enabled -}}
hearth-server
{{- else -}}
{{ required "tls.secretName: want the name of a Secret with tls.crt, tls.key and ca.crt, or one of tls.certManager.enabled and tls.selfSigned.enabled" .Values.tls.secretName }}
{{- end -}}
{{- end }}

{{/* Manifests of Hearth's, for the namespace of the release. Namespace and service account are the chart's own. */}}
{{- define "hearth.manifests" -}}
{{- $release := .root.Release.Namespace -}}
{{- range $text := splitList "\n---\n" (.root.Files.Get .file) }}
{{- $o := fromYaml $text }}
{{- if not (has $o.kind (list "Namespace" "ServiceAccount")) }}
{{- if eq (dig "metadata" "namespace" "" $o) "hearth" }}{{ $_ := set $o.metadata "namespace" $release }}{{ end }}
{{- range $s := $o.subjects }}{{ $_ := set $s "namespace" $release }}{{ end }}
{{- range $w := $o.webhooks }}{{ $_ := set $w.clientConfig.service "namespace" $release }}{{ end }}
---
{{ toYaml $o }}
{{- end }}
{{- end }}
{{- end }}

{{/* cluster-autoscaler's flags that belong together, one a line. The first argument is the folder of its certificate. */}}
{{- define "hearth.autoscalerFlags" -}}
--cloud-provider=externalgrpc
--cloud-config=/etc/hearth/cloud-config.yaml
--expander=grpc,least-waste
--grpc-expander-url=hearth.{{ .Release.Namespace }}.svc:8088
--grpc-expander-cert=/etc/hearth/tls/ca.crt
--scale-down-unneeded-time=10s
--scale-down-delay-after-add=30s
--unremovable-node-recheck-timeout=30s
--ignore-daemonsets-utilization=true
--daemonset-eviction-for-occupied-nodes=false
--skip-nodes-with-local-storage=false
--skip-nodes-with-system-pods=false
--max-failing-time=2m
{{- end }}
