from plant_mlops.ops.dags import dags; globals().update(dags())  # airflow
